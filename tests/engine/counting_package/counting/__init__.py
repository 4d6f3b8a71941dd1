"""A complete task in a package of its own: how many dots are there in a picture?"""
