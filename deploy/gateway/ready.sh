#!/usr/bin/env bash
# Whether an Envoy that ends TLS can: /ready knows nothing of certificates, and without a good one the
# listener closes every connection. Bash alone, as drain.sh. The chart asks this for readiness.
#
#   ready.sh [ADMIN_PORT]
set -uo pipefail
admin=${1:-9901}

ask() { # PATH
  exec 3<>"/dev/tcp/127.0.0.1/$admin" || exit
  printf 'GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n' "$1" >&3
  cat <&3
  exec 3>&-
}

# It lists certificates only of a listener that has all its secrets.
[[ $(ask /ready) == 'HTTP/1.1 200 '* && $(ask /certs) == *'"valid_from"'* ]]
