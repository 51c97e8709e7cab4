#!/bin/sh
# Makes the secrets that compose.yaml mounts: the cluster's token, and one key of the S3 server, in the two forms that the
# server and its clients read. What exists already stays. Containers read the files as users of their own, so the files are
# readable, and the folder is this user's alone.
set -eu
cd "$(dirname "$0")"
umask 022
mkdir -p secrets
chmod 700 secrets

random() { od -An -N "$1" -tx1 /dev/urandom | tr -d ' \n'; }

[ -e secrets/token ] || random 32 >secrets/token
if [ ! -e secrets/aws_credentials ] || [ ! -e secrets/s3.json ]; then
  key=$(random 10)
  secret=$(random 20)
  printf '[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n' "$key" "$secret" >secrets/aws_credentials
  printf '{"identities": [{"name": "modelstore", "credentials": [{"accessKey": "%s", "secretKey": "%s"}], "actions": ["Admin", "Read", "List", "Tagging", "Write"]}]}\n' \
    "$key" "$secret" >secrets/s3.json
fi
