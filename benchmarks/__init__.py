"""What Muster claims about speed, measured side by side with what it is compared to. `python -m benchmarks --list`."""
