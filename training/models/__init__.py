"""Models: loaded, adapted, made faster, probed."""
