RUN = {}
