"""How a model gets ready to be trained: the pocket model is made here, any other one warmed up."""
