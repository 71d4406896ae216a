"""Networks: one architecture a file, each with its last layer apart, as ``head``, from its ``features``."""
