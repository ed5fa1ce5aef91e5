"""What a conversion gained and lost: measurements, the report they make, and the forms it is shown in."""
