"""The controller's end of the guest: frames, their meaning, and one multiplexed channel. Believes nothing."""
