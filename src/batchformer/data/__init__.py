"""What two or more tasks share: finding and fetching data, image folders and lists, samplers, transforms, loaders.

Nothing is imported here, so that ``batchformer.data.fetch`` (used by the command line's ``ls``) loads only the
standard library.
"""
