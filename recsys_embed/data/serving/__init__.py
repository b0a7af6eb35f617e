"""What turns raw rows into a model's inputs, stored with the model, and files of rows to files of scores."""
