"""What is special about other people's models: one module for each library, imported when such a model arrives.

Each offers ``find_classifier(model)`` and ``plan(model, places)``; see :class:`batchformer.insertion.plan.Adapter`.
"""
