"""Files behind a URL: stores, HTTP responses, and the cache of shards that the processes of a host share.

Nothing here decodes a video.
"""
