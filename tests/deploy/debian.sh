# SPDX-License-Identifier: Apache-2.0
# For the scripts that try things in an empty Debian 12. Sourced; needs root and debootstrap.

# debian_root DIR: a minimal Debian 12 in DIR, with this machine's apt settings. BEBOP_DEBIAN_ROOT names one that is ready to be copied.
debian_root() {
  local dir=$1
  if [[ -n ${BEBOP_DEBIAN_ROOT:-} ]]; then
    cp -a "$BEBOP_DEBIAN_ROOT" "$dir"
  else
    debootstrap --variant=minbase bookworm "$dir" http://deb.debian.org/debian >"$dir.log" 2>&1 || { tail -5 "$dir.log" >&2; return 1; }
  fi
  cp -a /etc/apt/apt.conf.d/. "$dir/etc/apt/apt.conf.d/"
  cp /etc/apt/sources.list.d/debian.sources "$dir/etc/apt/sources.list.d/" 2>/dev/null && : >"$dir/etc/apt/sources.list"
  cp /etc/resolv.conf "$dir/etc/resolv.conf"
  if [[ -d /usr/local/share/ca-certificates ]]; then cp -a /usr/local/share/ca-certificates "$dir/usr/local/share/"; fi
}

# in_debian DIR COMMAND...: runs it inside, with its own processes and mounts, gone when it ends.
in_debian() {
  local dir=$1
  shift
  unshare --mount --pid --fork --kill-child sh -c '
    root=$1; shift
    mount -t proc proc "$root/proc" && mount --bind /dev "$root/dev" && mount -t tmpfs tmpfs "$root/tmp" || exit 125
    exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 http_proxy="$http_proxy" \
      https_proxy="$https_proxy" chroot "$root" "$@"' sh "$dir" "$@"
}
