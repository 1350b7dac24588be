"""What a run leaves behind: how long it took, what it was asked, how good each layer is."""
