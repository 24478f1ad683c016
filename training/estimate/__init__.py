"""Parameters, memory and traits of a model, without the model. Free of torch."""
