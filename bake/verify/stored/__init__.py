"""Whether the files of an artifact hold its plan, value by value, read from the files alone."""
