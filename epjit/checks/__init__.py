"""What a call must be: refuses with value and remedy; launches nothing, allocates nothing."""
