"""Techniques: one a file; the file's name is the registered name, the recipe's, the test's and the docs page's."""
