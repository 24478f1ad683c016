"""What runs beside the driver and never in a worker: the loops of recipes over groups of workers."""
