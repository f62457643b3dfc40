"""Ebbtide: continuous data protection and replication of Linux block volumes."""

import os

# The floor is TLS 1.3. grpcio has no setter for it, but reads this variable when it is imported:
# one TLS 1.2 suite, an RSA one, that no ECDSA certificate can serve. TLS 1.3 suites are not
# affected. Set here, because here is before any import of grpc in our processes.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"
