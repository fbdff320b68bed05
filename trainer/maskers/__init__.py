"""Models that find what words say in an image, for masks beside images. Nothing here imports torch before it is needed."""
