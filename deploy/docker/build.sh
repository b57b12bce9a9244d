#!/bin/sh
# Build the image with the first of docker, podman and buildah that works here: sh deploy/docker/build.sh
# [more of its build arguments]. $IMAGE is the image's name, $CONTAINER_OPTIONS go before the command.
set -eu
cd "$(dirname "$0")/../.."

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' lorax_serve/_version.py)
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
image=${IMAGE:-lorax-serve:$version}

for builder in docker podman buildah; do
    # Docker's client may be there without anything behind it.
    if command -v "$builder" >/dev/null && "$builder" info >/dev/null 2>&1; then
        # Docker's format is the one that has health checks, which buildah does not write by itself.
        [ "$builder" = docker ] || set -- --format docker "$@"
        # shellcheck disable=SC2086 # a list
        exec "$builder" ${CONTAINER_OPTIONS:-} build \
            --file deploy/docker/Dockerfile --tag "$image" \
            --build-arg "VERSION=$version" --build-arg "REVISION=$revision" "$@" .
    fi
done
echo "make image: none of docker, podman and buildah works here" >&2
exit 1
