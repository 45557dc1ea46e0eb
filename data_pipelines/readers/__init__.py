"""One file per decoding library, each with a class that implements data_pipelines.decoders.VideoReader."""
