"""Data: one data set or kind of data a file."""
