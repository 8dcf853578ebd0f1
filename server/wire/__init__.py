"""What may enter and how it leaves: strict models of request bodies, their parsing, and the shapes of answers."""
