package symbolize

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Link is a network interface.
type Link struct {
	Index int
	Name  string
	Type  uint16 // ARPHRD_*
	Kind  string // "veth", "bridge" …, "" for hardware and loopback
	// Peer is the ifindex of the link's other end (IFLA_LINK), 0 for none.
	Peer int
	// PeerNSID is how the link's namespace numbers the one that Peer is in
	// (IFLA_LINK_NETNSID); -1 where Peer is in the same namespace.
	PeerNSID int
}

// sameNetns is Link.PeerNSID without IFLA_LINK_NETNSID.
const sameNetns = -1

// Links lists the namespace's interfaces.
func (n *Namespace) Links() ([]Link, error) { return n.links(netlink.Dump, 0) }

// LinkName is the name of the namespace's interface that has this index.
func (n *Namespace) LinkName(index int) (string, error) {
	links, err := n.links(0, index)
	if err != nil || len(links) == 0 {
		return "", err
	}
	return links[0].Name, nil
}

// links asks for the interface that has this index, or with flag Dump for all.
func (n *Namespace) links(flags netlink.HeaderFlags, index int) ([]Link, error) {
	info := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(info[4:], uint32(index))
	var links []Link
	err := n.netlink(unix.NETLINK_ROUTE, func(c *netlink.Conn) error {
		msgs, err := c.Execute(netlink.Message{
			Header: netlink.Header{Type: unix.RTM_GETLINK, Flags: netlink.Request | flags},
			Data:   info,
		})
		if err != nil {
			return err
		}
		for _, m := range msgs {
			if m.Header.Type != unix.RTM_NEWLINK {
				continue
			}
			l, err := parseLink(m.Data)
			if err != nil {
				return err
			}
			links = append(links, l)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("interfaces of net:[%d]: %w", n.Inode, err)
	}
	return links, nil
}

// netlink calls f with a socket that is inside the namespace.
func (n *Namespace) netlink(protocol int, f func(*netlink.Conn) error) error {
	return n.Do(func() error {
		c, err := netlink.Dial(protocol, nil)
		if err != nil {
			return err
		}
		defer c.Close()
		return f(c)
	})
}

// parseLink reads an RTM_NEWLINK: struct ifinfomsg and attributes.
func parseLink(b []byte) (Link, error) {
	if len(b) < unix.SizeofIfInfomsg {
		return Link{}, errors.New("short link message")
	}
	l := Link{
		Type:     binary.NativeEndian.Uint16(b[2:]),
		Index:    int(int32(binary.NativeEndian.Uint32(b[4:]))),
		PeerNSID: sameNetns,
	}
	ad, err := netlink.NewAttributeDecoder(b[unix.SizeofIfInfomsg:])
	if err != nil {
		return Link{}, fmt.Errorf("link message: %w", err)
	}
	for ad.Next() {
		switch ad.Type() {
		case unix.IFLA_IFNAME:
			l.Name = ad.String()
		case unix.IFLA_LINK:
			l.Peer = int(int32(ad.Uint32()))
		case unix.IFLA_LINK_NETNSID:
			l.PeerNSID = int(int32(ad.Uint32()))
		case unix.IFLA_LINKINFO:
			ad.Nested(func(nad *netlink.AttributeDecoder) error {
				for nad.Next() {
					if nad.Type() == unix.IFLA_INFO_KIND {
						l.Kind = nad.String()
					}
				}
				return nil
			})
		}
	}
	if err := ad.Err(); err != nil {
		return Link{}, fmt.Errorf("link message: %w", err)
	}
	return l, nil
}

// nsids asks how the namespace numbers others. Namespaces that have no number
// there are left out; asking gives none a number.
func (n *Namespace) nsids(others []*Namespace) (map[int]*Namespace, error) {
	ids := map[int]*Namespace{}
	err := n.netlink(unix.NETLINK_ROUTE, func(c *netlink.Conn) error {
		for _, o := range others {
			fd, err := o.open()
			if err != nil {
				continue // gone meanwhile
			}
			id, err := nsid(c, fd)
			unix.Close(fd)
			if err != nil {
				return err
			}
			if id >= 0 {
				ids[id] = o
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("namespace numbers of net:[%d]: %w", n.Inode, err)
	}
	return ids, nil
}

func nsid(c *netlink.Conn, fd int) (int, error) {
	const rtgenmsg = 4 // struct rtgenmsg, padded
	ae := netlink.NewAttributeEncoder()
	ae.Uint32(unix.NETNSA_FD, uint32(fd))
	attrs, err := ae.Encode()
	if err != nil {
		return 0, err
	}
	msgs, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETNSID, Flags: netlink.Request},
		Data:   append(make([]byte, rtgenmsg), attrs...),
	})
	if err != nil {
		return 0, err
	}
	for _, m := range msgs {
		if m.Header.Type != unix.RTM_NEWNSID || len(m.Data) < rtgenmsg {
			continue
		}
		ad, err := netlink.NewAttributeDecoder(m.Data[rtgenmsg:])
		if err != nil {
			return 0, err
		}
		for ad.Next() {
			if ad.Type() == unix.NETNSA_NSID {
				return int(int32(ad.Uint32())), ad.Err()
			}
		}
	}
	return unix.NETNSA_NSID_NOT_ASSIGNED, nil
}

// Veth is a pair of interfaces, one of which is in the namespace asked for.
type Veth struct {
	Inside  Link
	Outside Link
	Netns   *Namespace // where Outside is
}

// Veths finds the other ends of the namespace's veths. An interface number
// alone does not tell: every namespace has its own, so that the number is
// looked up in the namespace that the link's netnsid names, and has to name
// the inside link in return. Ends in namespaces that no process and no file
// leads to are left out.
func (n *Namespace) Veths() ([]Veth, error) {
	links, err := n.Links()
	if err != nil {
		return nil, err
	}
	others := n.sys.Namespaces()
	ids, err := n.nsids(others)
	if err != nil {
		return nil, err
	}
	outside := map[uint32][]Link{}
	var pairs []Veth
	for _, l := range links {
		if l.Kind != "veth" || l.Peer == 0 {
			continue
		}
		where := ids[l.PeerNSID]
		if l.PeerNSID == sameNetns {
			where = n
		}
		if where == nil {
			continue
		}
		if _, ok := outside[where.Inode]; !ok {
			list, err := where.Links()
			if err != nil {
				return nil, err
			}
			outside[where.Inode] = list
		}
		for _, o := range outside[where.Inode] {
			if o.Index == l.Peer && o.Peer == l.Index && o.Kind == "veth" {
				pairs = append(pairs, Veth{Inside: l, Outside: o, Netns: where})
			}
		}
	}
	return pairs, nil
}

// Addrs lists the addresses of the namespace's interfaces that packets from outside
// can have: neither loopback nor link-local ones.
func (n *Namespace) Addrs() ([]netip.Addr, error) {
	var addrs []netip.Addr
	err := n.Do(func() error {
		list, err := net.InterfaceAddrs()
		for _, a := range list {
			p, perr := netip.ParsePrefix(a.String())
			if perr != nil || p.Addr().IsLoopback() || p.Addr().IsLinkLocalUnicast() {
				continue
			}
			addrs = append(addrs, p.Addr())
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("addresses of net:[%d]: %w", n.Inode, err)
	}
	return addrs, nil
}
