"""Files, requests and folders that may fail. Free of torch."""
