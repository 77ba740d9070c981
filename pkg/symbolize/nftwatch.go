package symbolize

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// NFTWatch tells when the ruleset of a namespace changes. A nil *NFTWatch never
// tells anything.
type NFTWatch struct {
	conn *netlink.Conn
	raw  syscall.RawConn
	buf  []byte
}

// WatchNFT begins to watch a namespace's ruleset: it joins NFNLGRP_NFTABLES. It
// returns nil, nil where the kernel has no nf_tables or has not loaded the
// module: joining would load it. The namespace stays as long as the watch is
// open.
func WatchNFT(ns *Namespace) (*NFTWatch, error) {
	if !ns.sys.hasNFT() {
		return nil, nil
	}
	w := &NFTWatch{buf: make([]byte, 64<<10)}
	err := ns.Do(func() error {
		var err error
		if w.conn, err = netlink.Dial(unix.NETLINK_NETFILTER, nil); err != nil {
			return err
		}
		if err = w.conn.JoinGroup(unix.NFNLGRP_NFTABLES); err == nil {
			w.raw, err = w.conn.SyscallConn()
		}
		if err != nil {
			w.conn.Close()
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("watch nf_tables of net:[%d]: %w", ns.Inode, err)
	}
	return w, nil
}

// Changed reports whether anything was committed since the last call, or since
// WatchNFT. It does not wait. Where notifications were lost it reports a
// change.
func (w *NFTWatch) Changed() (bool, error) {
	if w == nil {
		return false, nil
	}
	changed := false
	for {
		var n int
		var err error
		rawErr := w.raw.Read(func(fd uintptr) bool {
			n, _, err = unix.Recvfrom(int(fd), w.buf, unix.MSG_DONTWAIT|unix.MSG_TRUNC)
			return true
		})
		switch {
		case rawErr != nil:
			return changed, rawErr
		case errors.Is(err, unix.EAGAIN):
			return changed, nil
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.ENOBUFS):
			changed = true
		case err != nil:
			return changed, fmt.Errorf("watch nf_tables: %w", err)
		default:
			changed = changed || n > len(w.buf) || hasNewGen(w.buf[:n])
		}
	}
}

// hasNewGen looks for NFT_MSG_NEWGEN, the last message of every commit, among
// messages. Others are of the commit as well, or tell of no change of rules
// (a quota that is used up). What is no message counts as one.
func hasNewGen(b []byte) bool {
	for len(b) > 0 {
		if len(b) < unix.SizeofNlMsghdr {
			return true
		}
		n := binary.NativeEndian.Uint32(b)
		if n < unix.SizeofNlMsghdr || uint64(n) > uint64(len(b)) {
			return true
		}
		if netlink.HeaderType(binary.NativeEndian.Uint16(b[4:])) == nftType(unix.NFT_MSG_NEWGEN) {
			return true
		}
		b = b[min(len(b), (int(n)+3)&^3):]
	}
	return false
}

// Close ends the watch.
func (w *NFTWatch) Close() error {
	if w == nil {
		return nil
	}
	return w.conn.Close()
}
