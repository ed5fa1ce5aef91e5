"""What a conversion gained and lost: measuring, the schema of a report, and its pages."""
