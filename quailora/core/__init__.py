"""The mathematics: statistics of inputs, metrics, and the problem that every solver gets. Needs nothing but PyTorch."""
