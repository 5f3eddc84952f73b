"""Made scans as a dataset of the same build as the user's own: files, masks, and the tables that go with them."""
