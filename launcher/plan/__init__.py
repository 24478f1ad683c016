"""What a job needs of memory, time and money on given machines. Pure."""
