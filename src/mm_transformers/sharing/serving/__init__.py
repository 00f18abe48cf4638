"""A saved model behind HTTP: rows of many clients share forward passes. `create_app` is in `app`."""
