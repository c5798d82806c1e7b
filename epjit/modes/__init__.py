"""The order of launches, and which array goes to which parameter; owns symmetric memory."""
