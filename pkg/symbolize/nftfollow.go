package symbolize

import (
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// NFTFollower knows every generation of a namespace's nf_tables, from one that it read on: the
// kernel tells of each commit what it changed. It keeps a socket in the namespace, which lives
// at least as long.
type NFTFollower struct {
	conn  *netlink.Conn
	inode uint32
	model *nftModel
	gen   uint32            // of model
	msgs  []netlink.Message // received, and not applied: their commit is not over
	seen  int               // of msgs: none of them is a commit's end
}

// nftFollowBuffer is how many bytes of messages may wait, as the kernel counts them: those of
// some ten thousand rules.
const nftFollowBuffer = 32 << 20

// FollowNFT reads a namespace's rulesets, as ReadNFT does, and follows them from then on. It
// fails where nf_tables is not loaded: asking would load it. Close is to be called in the end.
func FollowNFT(ns *Namespace, idle func() (bool, error)) (*NFTFollower, *NFTRuleset, error) {
	if !ns.sys.hasModule("nf_tables") {
		return nil, nil, errors.New("nf_tables is not loaded")
	}
	f := &NFTFollower{inode: ns.Inode}
	var r *NFTRuleset
	err := ns.Do(func() (err error) {
		f.conn, err = netlink.Dial(unix.NETLINK_NETFILTER, nil)
		if err != nil {
			return err
		}
		// First what will change, then what is: what was before it is left out (Next).
		if err := f.conn.SetReadBuffer(nftFollowBuffer); err != nil {
			return fmt.Errorf("make room for notifications: %w", err)
		}
		if err := f.conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
			return fmt.Errorf("ask for notifications: %w", err)
		}
		asking, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
		if err != nil {
			return err
		}
		defer asking.Close()
		f.model, f.gen, err = readNFT(asking.Execute, idle)
		if err == nil {
			r, err = f.model.ruleset(f.gen)
		}
		return err
	})
	if err != nil {
		f.Close()
		return nil, nil, f.failed(err)
	}
	return f, r, nil
}

// Next returns the next generation. Where there is none before the deadline the error is an
// os.ErrDeadlineExceeded, and Next may be called again. After any other error the namespace is
// to be read anew.
func (f *NFTFollower) Next(deadline time.Time) (*NFTRuleset, error) {
	if err := f.conn.SetReadDeadline(deadline); err != nil {
		return nil, f.failed(err)
	}
	for {
		for f.seen < len(f.msgs) {
			m := f.msgs[f.seen]
			if m.Header.Type != nftType(unix.NFT_MSG_NEWGEN) {
				f.seen++
				continue
			}
			commit := f.msgs[:f.seen]
			f.msgs, f.seen = f.msgs[f.seen+1:], 0
			if r, err := f.commit(commit, m); r != nil || err != nil {
				return r, err
			}
		}
		msgs, err := f.conn.Receive()
		if err != nil {
			return nil, f.failed(err)
		}
		f.msgs = append(f.msgs, msgs...)
	}
}

// commit makes the next generation; nil if it was read before. newGen is what tells of it.
func (f *NFTFollower) commit(msgs []netlink.Message, newGen netlink.Message) (*NFTRuleset, error) {
	gen, err := parseNFTGen(newGen.Data)
	if err != nil {
		return nil, f.failed(err)
	}
	if int32(gen-f.gen) <= 0 {
		return nil, nil
	}
	r, err := f.model.commit(msgs, f.gen, gen)
	if err != nil {
		return nil, f.failed(err)
	}
	f.gen = gen
	return r, nil
}

// Close lets the namespace go. It may be called while Next runs, which then fails.
func (f *NFTFollower) Close() {
	if f.conn != nil {
		f.conn.Close()
	}
}

func (f *NFTFollower) failed(err error) error {
	if errors.Is(err, unix.ENOBUFS) {
		err = errors.New("it changed faster than nftrace could read")
	}
	return fmt.Errorf("nf_tables of net:[%d]: %w", f.inode, err)
}

// commit makes generation gen of the one before.
func (m *nftModel) commit(msgs []netlink.Message, before, gen uint32) (*NFTRuleset, error) {
	// net/netfilter/nf_tables_api.c:nf_tables_commit leaves out 0.
	if next := before + 1; gen != next && (next != 0 || gen != 1) {
		return nil, nftGap("generation %d came behind %d", gen, before)
	}
	m.appended = nil
	for _, c := range m.cut {
		c.headCut, c.tailCut, c.refilled = false, false, 0
	}
	m.cut = nil
	for _, msg := range msgs {
		if err := m.apply(msg); err != nil {
			return nil, err
		}
	}
	return m.ruleset(gen)
}
