"""What goes out: versions of the actor's weights, by disk or by broadcast, and whose turn it is to swap to them."""
