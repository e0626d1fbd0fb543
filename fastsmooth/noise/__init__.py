"""What is measured of the gradient's noise and of the loss around the weights; no trainer."""
