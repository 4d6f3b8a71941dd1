"""One folder per problem, each with the same files in the order data flows: data, model, loss, metrics, task."""
