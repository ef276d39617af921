"""The workspace as a filtered overlay: what is hidden, who owns it inside, how it goes away again. D4"""
