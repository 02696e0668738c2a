"""Will it fit, how long does it take, what should be tried: asked before anything is spent."""
