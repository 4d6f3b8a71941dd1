"""Data for all tasks: finding and fetching it, image folders and lists, samplers, transforms, loaders, whole files.

Nothing is imported here, so that ``batchformer.data.fetch`` (used by the command line's ``ls``) loads only the
standard library.
"""
