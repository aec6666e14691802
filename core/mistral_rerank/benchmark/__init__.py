"""How fast a model scores here, alone and beside other libraries on the same weights."""
