"""Speed of a model on this machine, alone and against other libraries with the same weights."""
