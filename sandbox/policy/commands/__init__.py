"""Judge a command line: read it as a shell would, peel what runs other programs, decide each command. D6"""
