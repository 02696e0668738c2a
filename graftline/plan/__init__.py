"""Before a training: will it fit, how long will it take, and which method should be used?"""
