"""What any training method may reuse: the loop, masks, losses, steps, norm layers."""
