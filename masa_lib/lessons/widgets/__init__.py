"""Panels for notebooks: controls over the rooms of the library, without maths of their own."""
