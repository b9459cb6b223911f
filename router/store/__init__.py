"""Where journals and finished responses lie: one contract (`Store` in router/journal), SQLite and Redis behind it."""
