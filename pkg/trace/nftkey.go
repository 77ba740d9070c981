package trace

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nftKey keeps nf_tables calling __nft_trace_packet for all packets of the host. The kernel
// does so while any rule has "meta nftrace set" in it, in whatever network namespace
// (net/netfilter/nft_meta.c:nft_meta_set_init): here it is one in a chain without a hook, in a
// namespace that has nothing else and that lives as long as this socket.
type nftKey struct{ conn *netlink.Conn }

// newNFTKey makes one. learn, if not nil, is called in its namespace.
func newNFTKey(learn func(*nftKey) error) (*nftKey, error) {
	k := &nftKey{}
	err := inNewNetns(func() error {
		var err error
		if k.conn, err = netlink.Dial(unix.NETLINK_NETFILTER, nil); err != nil {
			return fmt.Errorf("netlink: %w", err)
		}
		if err := k.addRule(); err != nil {
			return fmt.Errorf("have nf_tables tell of rules: %w", err)
		}
		if learn != nil {
			return learn(k)
		}
		return nil
	})
	if err != nil {
		if k.conn != nil {
			k.conn.Close()
		}
		return nil, ownNetnsError(err)
	}
	return k, nil
}

// ownNetnsError says what helps where the kernel refuses.
func ownNetnsError(err error) error {
	err = fmt.Errorf("a network namespace of nftrace's own: %w", err)
	if errors.Is(err, os.ErrPermission) {
		err = fmt.Errorf("%w, although this is root: it lacks CAP_SYS_ADMIN or CAP_NET_ADMIN, as in a container without --privileged", err)
	}
	return err
}

// Close lets the kernel forget the namespace and the rule.
func (k *nftKey) Close() error { return k.conn.Close() }

// inNewNetns runs f on a thread that is in a new network namespace.
func inNewNetns(f func() error) error {
	errs := make(chan error)
	go func() {
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			errs <- err
			return
		}
		defer unix.Close(home)
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			errs <- err
			return
		}
		err = f()
		// A thread that cannot go back is not used again: it stays locked.
		if unix.Setns(home, unix.CLONE_NEWNET) == nil {
			runtime.UnlockOSThread()
		}
		errs <- err
	}()
	return <-errs
}

// Of include/uapi/linux/netfilter/nf_tables.h and nfnetlink.h.
const (
	nftSubsys  = 10 << 8 // NFNL_SUBSYS_NFTABLES, in a message's type
	batchBegin = 0x10
	batchEnd   = 0x11

	nftNewTable = nftSubsys
	nftNewChain = nftSubsys | 3
	nftNewRule  = nftSubsys | 6
	nftGetGen   = nftSubsys | 16

	nftReg1    = 1
	nftNFTrace = 12 // NFT_META_NFTRACE
)

// keyTable is the table of the key's namespace.
const keyTable = "nftrace"

// addRule adds a table with a chain with the rule "meta nftrace set 0".
func (k *nftKey) addRule() error {
	const table, chain = keyTable, "none"
	expr := func(name string, data func(*netlink.AttributeEncoder) error) func(*netlink.AttributeEncoder) error {
		return func(e *netlink.AttributeEncoder) error {
			e.String(1, name) // NFTA_EXPR_NAME
			e.Nested(2, data) // NFTA_EXPR_DATA
			return nil
		}
	}
	attrs := func(fill func(*netlink.AttributeEncoder)) []byte {
		e := netlink.NewAttributeEncoder()
		e.ByteOrder = binary.BigEndian
		fill(e)
		b, err := e.Encode()
		if err != nil {
			panic("trace: " + err.Error()) // of constants
		}
		// struct nfgenmsg: family, version, resource
		return append([]byte{unix.AF_INET, unix.NFNETLINK_V0, 0, 0}, b...)
	}
	batch := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, nftSubsys >> 8}
	const create = netlink.Request | netlink.Create | netlink.Acknowledge
	messages := []netlink.Message{
		{Header: netlink.Header{Type: batchBegin, Flags: netlink.Request}, Data: batch},
		{Header: netlink.Header{Type: nftNewTable, Flags: create}, Data: attrs(func(e *netlink.AttributeEncoder) {
			e.String(1, table) // NFTA_TABLE_NAME
		})},
		{Header: netlink.Header{Type: nftNewChain, Flags: create}, Data: attrs(func(e *netlink.AttributeEncoder) {
			e.String(1, table) // NFTA_CHAIN_TABLE
			e.String(3, chain) // NFTA_CHAIN_NAME
		})},
		{Header: netlink.Header{Type: nftNewRule, Flags: create}, Data: attrs(func(e *netlink.AttributeEncoder) {
			e.String(1, table)                                    // NFTA_RULE_TABLE
			e.String(2, chain)                                    // NFTA_RULE_CHAIN
			e.Nested(4, func(e *netlink.AttributeEncoder) error { // NFTA_RULE_EXPRESSIONS
				e.Nested(1, expr("immediate", func(e *netlink.AttributeEncoder) error {
					e.Uint32(1, nftReg1)                                  // NFTA_IMMEDIATE_DREG
					e.Nested(2, func(e *netlink.AttributeEncoder) error { // NFTA_IMMEDIATE_DATA
						e.Uint8(1, 0) // NFTA_DATA_VALUE
						return nil
					})
					return nil
				}))
				e.Nested(1, expr("meta", func(e *netlink.AttributeEncoder) error {
					e.Uint32(2, nftNFTrace) // NFTA_META_KEY
					e.Uint32(3, nftReg1)    // NFTA_META_SREG
					return nil
				}))
				return nil
			})
		})},
		{Header: netlink.Header{Type: batchEnd, Flags: netlink.Request}, Data: batch},
	}
	if _, err := k.conn.SendMessages(messages); err != nil {
		return err
	}
	// One acknowledgement for each thing that is new.
	for range 3 {
		if _, err := k.conn.Receive(); err != nil {
			return err
		}
	}
	return nil
}

// generation is that of the namespace's rulesets (NFTA_GEN_ID).
func (k *nftKey) generation() (uint32, error) {
	replies, err := k.conn.Execute(netlink.Message{
		Header: netlink.Header{Type: nftGetGen, Flags: netlink.Request},
		Data:   []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, 0},
	})
	if err != nil {
		return 0, err
	}
	for _, r := range replies {
		if len(r.Data) < 4 {
			continue
		}
		ad, err := netlink.NewAttributeDecoder(r.Data[4:])
		if err != nil {
			return 0, err
		}
		ad.ByteOrder = binary.BigEndian
		for ad.Next() {
			if ad.Type() == 1 { // NFTA_GEN_ID
				return ad.Uint32(), ad.Err()
			}
		}
	}
	return 0, errors.New("nf_tables does not tell its generation")
}
