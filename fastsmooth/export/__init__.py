"""The trained model of a run in the forms that other programs open."""
