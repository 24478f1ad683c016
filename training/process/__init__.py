"""The process of a worker: its place in a process group, its memory, its signs of life."""
