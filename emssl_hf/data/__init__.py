"""Files of micrographs -> data sets -> memory-mapped pixels -> batches; knows nothing of models."""
