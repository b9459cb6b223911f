"""Numbers: as a source stores them, as an operator reads them, and how near the two are."""
