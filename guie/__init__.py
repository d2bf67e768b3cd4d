"""The rooms behind utilities.py; each imports from rooms above it only (tests/test_house.py has their order)."""
